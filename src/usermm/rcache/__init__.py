"""The registration cache: memory is handed to a device once, and never believed to be there longer than it is."""
