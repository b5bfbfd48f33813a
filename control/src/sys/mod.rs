//! Operating system services that several modules need: paths and private files of the home, processes and users, child
//! processes, sockets, the journal, the launcher of a root daemon, and the namespaces of `landfall run`.
//!
//! No file here decides which ports are forwarded or which containers are registered. Signals go to pidfds and to
//! unreaped children only, and files of the home are opened without following links.

pub(crate) mod child;
pub(crate) mod directory_access;
pub mod event_loop;
pub mod graceful_close;
pub(crate) mod held_port;
pub mod journal;
pub(crate) mod launcher;
pub(crate) mod loopback;
pub mod paths;
pub(crate) mod private_file;
pub mod processes;
pub(crate) mod random;
pub(crate) mod readiness;
pub mod sandbox;
pub(crate) mod socket_file;
pub(crate) mod token_variables;
pub(crate) mod users;
