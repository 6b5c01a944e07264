"""Model components: plain nn.Modules without I/O and without parallelism."""
