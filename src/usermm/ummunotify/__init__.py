"""The notification device."""
