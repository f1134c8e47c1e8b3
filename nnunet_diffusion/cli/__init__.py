"""The console command `nnunet_diffusion`: one module per subcommand, combined in `main`."""
