"""What every layer uses: errors, files, the console, devices, processes."""
