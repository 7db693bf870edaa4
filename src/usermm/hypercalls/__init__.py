"""The messages between a domain and the hypervisor: operations, layouts and limits that both sides share."""
