"""Training: `driver` decides and launches, `worker` is what runs on a device, `feed` joins our data to TRL."""
