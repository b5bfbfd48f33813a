//! One relayed connection as pure state machines: what to do next, given what happened. No socket is touched here, no
//! clock read; a shard feeds [`Input`]s and carries out [`Action`]s. Pure.

mod action;
mod connection;
mod dial;
mod half;

pub use action::{Action, Actions, Direction, Input, Operation, ReadEnd, Side};
pub use connection::Connection;
pub use dial::{Dial, DialStep};
