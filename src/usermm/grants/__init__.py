"""A domain's side of grant tables: its connection, and the three devices with their contracts."""
