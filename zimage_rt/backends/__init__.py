"""What runs a bundle's modules. One file a backend; nothing here imports a backend's library."""
