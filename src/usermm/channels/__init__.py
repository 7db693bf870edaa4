"""Byte streams and arrays between two domains, on persistent grants and an event channel."""
