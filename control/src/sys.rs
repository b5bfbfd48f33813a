//! System facilities that several parts of the daemon share.

pub(crate) mod private_file;
