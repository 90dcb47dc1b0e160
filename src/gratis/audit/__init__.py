"""Proofs: what the pure rule says of a request log, and of a ledger."""
