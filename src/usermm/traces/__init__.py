"""Traces that the preload library writes: read, and searched for the mistakes of whoever uses the devices."""
