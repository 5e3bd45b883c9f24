"""Keep a run alive and watch it: starts neurojepa.pretrain as processes, reads its directory."""
