//! One relayed connection as pure state machines, which return the next actions for each event. They use no socket and read
//! no clock; a shard passes [`Input`]s in and carries out the [`Action`]s. Pure.

mod action;
mod connection;
mod dial;
mod half;

pub use action::{Action, Actions, Direction, Input, ReadEnd, Side};
pub use connection::Connection;
pub use dial::{Dial, DialStep};
