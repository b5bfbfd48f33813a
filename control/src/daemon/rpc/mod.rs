//! The daemon's Unix socket (wire specification, A.1): one line of JSON in, one line of JSON out, and the end.
//!
//! - `codec` finds the one line in whatever pieces it comes. Pure.
//! - `protocol` is what a line may say, parsed at the door, and what is answered. Pure.
//! - `request_handler` is what is answered, for both transports.
//! - `server` accepts, reads, answers and closes; `arrivals` keeps requests that come together in their order.
//! - `client` asks, and `ensure` sees to it that there is somebody to ask. Both are synchronous: a verb of the command
//!   line has nothing else to do while it waits.

mod arrivals;
pub mod client;
pub mod codec;
pub mod ensure;
mod native;
pub mod protocol;
pub mod request_handler;
pub mod server;
