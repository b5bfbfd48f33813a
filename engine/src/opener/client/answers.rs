//! The answers of the program inside: parses them, and checks the sockets that came. Pure, except for [`ask`] and [`take`],
//! which use a channel directly.
//!
//! A parser here takes the text of one message and the sockets next to it, in whatever form the caller holds sockets.

use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::net::{RecvFlags, SendFlags};

use super::super::{ANSWER_BYTES_MAX, Answer, DialFailure, Failure, FailureKind, PortRange, Request};
use super::OpenError;
use crate::channel::{self, ChannelError};
use crate::command::Family;
use crate::sys::SocketFacts;

/// The reason why no sockets came.
#[derive(Debug, thiserror::Error)]
pub enum StockError {
    /// The opener has ended.
    #[error("the program inside has ended, so the namespace can no longer be reached")]
    Gone,
    /// Descriptors ran out in this process or in the opener.
    #[error("no more sockets: {0}")]
    Exhausted(String),
    /// The opener cannot create such sockets, for example because IPv6 is unavailable inside.
    #[error("{0}")]
    Refused(Failure),
    /// The answer does not fit the request. No later answer on this channel is trusted.
    #[error("the answer of the program inside does not fit the request: {0}")]
    Hostile(String),
}

impl From<ChannelError> for StockError {
    fn from(error: ChannelError) -> StockError {
        match error {
            ChannelError::Gone => StockError::Gone,
            ChannelError::DescriptorsLost | ChannelError::System(_) => {
                StockError::Exhausted(error.to_string())
            }
            error => StockError::Hostile(error.to_string()),
        }
    }
}

/// The answer to a request for sockets.
#[derive(Debug)]
pub(crate) struct Made<S> {
    /// The sockets, at least one.
    pub(crate) sockets: Vec<S>,
    /// The ephemeral ports of the namespace, if the program inside reports them.
    pub(crate) ephemeral: Option<PortRange>,
}

/// The answer to a dial.
#[derive(Debug)]
pub(crate) struct Dialled<S> {
    /// The number of the dial.
    pub(crate) dial: u64,
    /// The connected socket, or the reason of the failure.
    pub(crate) result: Result<S, DialFailure>,
}

/// Parses the answer to a [`Request::Sockets`] for `asked` sockets. `check` returns the fault of a socket, if it has one.
///
/// # Errors
/// See [`StockError`]. All sockets are dropped.
pub(crate) fn made<S>(
    asked: u16,
    text: &[u8],
    sockets: Vec<S>,
    check: impl Fn(&S) -> Result<(), &'static str>,
) -> Result<Made<S>, StockError> {
    let (count, error, ephemeral) = match parse(text)? {
        Answer::Made { count, .. } if count > asked => {
            return Err(StockError::Hostile(format!("{count} sockets where {asked} were asked for")));
        }
        Answer::Made { count, error, ephemeral } => (usize::from(count), error, ephemeral),
        Answer::Failed { failure } => (0, Some(failure), None),
        other => return Err(StockError::Hostile(format!("{other:?} where sockets were asked for"))),
    };
    if count != sockets.len() {
        return Err(StockError::Hostile(format!("{} descriptors instead of {count}", sockets.len())));
    }
    for socket in &sockets {
        check(socket).map_err(|what| StockError::Hostile(what.to_owned()))?;
    }
    match error {
        _ if count > 0 => Ok(Made { sockets, ephemeral }),
        Some(failure) if failure.kind == FailureKind::Exhausted => Err(StockError::Exhausted(failure.detail)),
        Some(failure) => Err(StockError::Refused(failure)),
        None => Err(StockError::Hostile("an answer without sockets and without a reason".to_owned())),
    }
}

/// Parses the answer to [`Request::Dial`]. `check` returns the fault of the socket, if it has one.
///
/// # Errors
/// See [`StockError`]. All sockets are dropped.
pub(crate) fn dialled<S>(
    text: &[u8],
    mut sockets: Vec<S>,
    check: impl Fn(&S) -> Result<(), &'static str>,
) -> Result<Dialled<S>, StockError> {
    let answer = parse(text)?;
    match (answer, sockets.pop()) {
        (Answer::Dialled { dial }, Some(socket)) if sockets.is_empty() => {
            check(&socket).map_err(|what| StockError::Hostile(what.to_owned()))?;
            Ok(Dialled { dial, result: Ok(socket) })
        }
        (Answer::NotDialled { dial, why }, None) => Ok(Dialled { dial, result: Err(why) }),
        (answer, socket) => {
            let count = sockets.len() + usize::from(socket.is_some());
            Err(StockError::Hostile(format!("{answer:?} with {count} descriptors")))
        }
    }
}

fn parse(text: &[u8]) -> Result<Answer, StockError> {
    serde_json::from_slice(text).map_err(|error| ChannelError::Malformed(error).into())
}

/// Checks a socket for a stock: an unused, non-blocking TCP socket of `family` in the namespace of `netns_cookie`.
///
/// # Errors
/// The fault of the socket.
pub(crate) fn check_unused(
    facts: &SocketFacts,
    family: Family,
    netns_cookie: u64,
) -> Result<(), &'static str> {
    check_tcp(facts)?;
    is(facts.family == Some(family), "a socket of another address family")?;
    is(!facts.is_connected, "a socket that is connected")?;
    let unbound = |local: std::net::SocketAddr| local.port() == 0 && local.ip().is_unspecified();
    is(facts.local.is_some_and(unbound), "a socket that is bound")?;
    // A blocking socket would stop the whole shard.
    is(facts.nonblocking, "a socket that blocks")?;
    is(facts.netns_cookie == Some(netns_cookie), "a socket of another network namespace")
}

/// Checks the socket of a dial: a non-blocking TCP socket that was connected. It may be broken by now: the server inside may
/// have reset the connection at once, and the client is to get that reset after every byte that preceded it.
///
/// # Errors
/// The fault of the socket.
pub(crate) fn check_connected(facts: &SocketFacts) -> Result<(), &'static str> {
    check_tcp(facts)?;
    // A socket that was reset has no peer any more, but keeps its own port.
    let was_connected = facts.is_connected || facts.local.is_some_and(|own| own.port() != 0);
    is(was_connected, "a socket that was never connected")?;
    is(facts.nonblocking, "a socket that blocks")
}

fn check_tcp(facts: &SocketFacts) -> Result<(), &'static str> {
    is(facts.is_socket, "a descriptor that is no socket")?;
    is(facts.family.is_some(), "a socket of another address family")?;
    is(facts.is_stream, "a socket that is no stream")?;
    is(facts.is_tcp, "a stream socket that is not TCP")?;
    is(!facts.listens, "a socket that listens")
}

fn is(holds: bool, otherwise: &'static str) -> Result<(), &'static str> {
    if holds { Ok(()) } else { Err(otherwise) }
}

/// Requests `count` sockets of `family`. Never waits; [`take`] returns them, in the order of the requests.
///
/// # Errors
/// [`OpenError::Channel`] with [`ChannelError::WouldBlock`] when too many requests are unanswered;
/// [`OpenError::Ended`] if the opener has ended.
pub fn ask(
    channel: BorrowedFd<'_>,
    family: Family,
    count: u16,
    congestion: Option<&str>,
) -> Result<(), OpenError> {
    let request = Request::Sockets { family, count, congestion: congestion.map(str::to_owned) };
    Ok(channel::send(channel, &request, &[], SendFlags::DONTWAIT)?)
}

/// Returns the answer to the oldest [`ask`], for `asked` sockets, without waiting, or `None` if it has not arrived. Returns
/// one to `asked` sockets, each an unused, non-blocking TCP socket of `family` in the namespace of `netns_cookie`.
///
/// # Errors
/// See [`StockError`]. All received descriptors are closed.
pub fn take(
    channel: BorrowedFd<'_>,
    family: Family,
    asked: u16,
    netns_cookie: u64,
) -> Result<Option<Vec<OwnedFd>>, StockError> {
    let received = match channel::receive_bytes(channel, ANSWER_BYTES_MAX, RecvFlags::DONTWAIT) {
        Err(ChannelError::WouldBlock) => return Ok(None),
        received => received?.ok_or(StockError::Gone)?,
    };
    let (text, sockets) = received;
    let check = |socket: &OwnedFd| check_unused(&SocketFacts::of(socket), family, netns_cookie);
    made(asked, &text, sockets, check).map(|made| Some(made.sockets))
}
