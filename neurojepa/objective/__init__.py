"""What is predicted of what: views, masks and losses, on the device."""
