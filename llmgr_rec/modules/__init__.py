"""The model's parts: plain nn.Modules without I/O and without parallelism."""
