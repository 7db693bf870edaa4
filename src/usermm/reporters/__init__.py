"""What commands show: reporters get plain data and write text. They know nothing of devices."""
