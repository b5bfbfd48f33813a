//! Values that several modules share: registrations, port policy, events, the forward table. Pure: no file here performs
//! I/O, reads a clock or starts a process.

pub mod announcement;
pub mod event;
pub mod forward_table;
pub mod grants;
pub mod name;
pub mod native_sockets;
pub mod native_state;
pub mod port_policy;
pub mod registration;
pub mod size;
pub mod trust;
