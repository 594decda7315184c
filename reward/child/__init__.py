"""What runs inside the sandbox: the fork server, the jail, the jobs. Standard library only (math-verify where asked)."""
