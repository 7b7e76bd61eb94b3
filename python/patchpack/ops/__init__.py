"""Public ops: what each promises, its checks, its registration and its gradient."""
