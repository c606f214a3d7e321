"""What checkpoints a folder holds."""


def steps(folder):
    return sorted(int(path.name.rpartition("-")[2]) for path in folder.glob("checkpoint-*"))
