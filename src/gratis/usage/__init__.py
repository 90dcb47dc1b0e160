"""Usage: what providers report of a request, and what can be known of it before it is sent."""

from gratis.usage.bound import bound, tokenizer
from gratis.usage.requests import request
from gratis.usage.shapes import read
from gratis.usage.streams import AsyncWatched, Watched, watch

__all__ = ["AsyncWatched", "Watched", "bound", "read", "request", "tokenizer", "watch"]
