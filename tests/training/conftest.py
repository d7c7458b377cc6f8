from one_process import joined, source

__all__ = ["joined", "source"]
