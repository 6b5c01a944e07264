"""TorchX components, and a driver that runs all steps in sequence."""
