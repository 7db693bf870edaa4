"""What kernel, user and container allow, tried, and what gets the rest: plain data, nothing printed."""
