//! The daemon's Unix socket (wire specification, A.1): one line of JSON in, one line of JSON out, and the end.
//!
//! - `codec` finds the one line in whatever pieces it comes. Pure.
//! - `protocol` is what a line may say, parsed at the door, and what is answered. Pure.

pub mod codec;
pub mod protocol;
