//! RPC over the daemon's Unix socket (wire specification, A.1): one line of JSON as the request and one as the answer, then
//! the connection is closed.
//!
//! A connection is reading its line, waiting for its order of arrival, being answered, or streaming (events, reports). A
//! connection never carries a second request, and an error never shows JSON that was not parsed at the edge.
//!
//! - `codec` extracts the line from chunks. Pure.
//! - `protocol` parses requests and serialises responses. Pure.
//! - `request_handler` answers requests of both transports.
//! - `server` accepts, reads, answers and closes; `arrivals` keeps concurrent requests in their order.
//! - `client` sends requests, and `ensure` starts the daemon if needed. Both are synchronous, since a verb of the command
//!   line has no other work while it waits.

mod arrivals;
pub mod client;
pub mod codec;
pub mod ensure;
mod native;
pub mod protocol;
pub mod request_handler;
pub mod server;
