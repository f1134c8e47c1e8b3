"""The console command `nnunet_diffusion`: one module per subcommand, put together in `main`."""
