"""The paper's observation as numbers (Sec. 3.2): what anchors are, measured over many images of any encoder."""
