"""What runs beside the devices: signals, files, locks, other processes."""
