"""The kernel's layouts, request numbers and text formats: one module for each header, facts only."""
