"""Where invalidations come from: each monitor says what it promises, and can be tried on this machine."""
