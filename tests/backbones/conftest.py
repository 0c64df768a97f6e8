from tests.tiny import sd3_folder, sd35_folder

__all__ = ["sd35_folder", "sd3_folder"]
