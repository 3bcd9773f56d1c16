"""Images, networks, their layers and activations, and the device on which they run."""
