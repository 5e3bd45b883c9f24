"""From a scan file to voxels on the archive grid."""
