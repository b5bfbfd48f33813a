//! What the daemon knows of containers, and keeps across every crash.
//!
//! - `model` is one registration, valid by construction.

pub mod model;
