"""TorchX components and the driver that runs them one after the other."""
