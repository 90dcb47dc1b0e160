"""Request logs judged as columns: Arrow tables in, Arrow tables out, by one compiled pass over the rows."""
