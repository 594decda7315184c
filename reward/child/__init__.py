"""What runs inside the sandbox: imported there by a bare interpreter, without the parent package around it."""
