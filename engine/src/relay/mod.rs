//! One relayed connection as pure state machines: the next action, given the last event. No socket is used here and no
//! clock is read; a shard feeds [`Input`]s and carries out [`Action`]s. Pure.

mod action;
mod connection;
mod dial;
mod half;

pub use action::{Action, Actions, Direction, Input, ReadEnd, Side};
pub use connection::Connection;
pub use dial::{Dial, DialStep};
