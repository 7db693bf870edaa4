"""The hypervisor: the broker that owns the memory, the namespaces and the truth, and never touches data."""
