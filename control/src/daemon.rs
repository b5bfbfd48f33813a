//! The daemon.

pub mod stop;
