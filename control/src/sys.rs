//! System facilities that several parts of the daemon share.

pub(crate) mod held_port;
pub(crate) mod launcher;
pub(crate) mod loopback;
pub(crate) mod private_file;
pub(crate) mod random;
pub(crate) mod readiness;
pub(crate) mod seclusion;
pub(crate) mod token_variables;
pub(crate) mod users;
