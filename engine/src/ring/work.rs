//! The operations of both real rings as work that waits for readiness: begun, tried when the descriptor is ready, waited
//! for again. Which readiness, and what a try does, stands here once; how readiness is told is each ring's own.

use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::rc::Rc;

use rustix::event::PollFlags;
use rustix::fd::{AsFd, OwnedFd};

use super::pool::{Loan, Pool};
use super::{Dialled, Op, Outcome, Received, Ring, Way, attempt};
use crate::channel::ChannelError;
use crate::command::Family;
use crate::opener::client::{self as opener, StockError};
use crate::sys::{SocketError, congestion};

/// An operation that waits for its descriptor.
#[derive(Debug)]
pub(super) enum Work {
    Accept {
        listener: Rc<OwnedFd>,
    },
    Connect {
        socket: Rc<OwnedFd>,
    },
    Recv {
        socket: Rc<OwnedFd>,
        way: Way,
    },
    Send {
        socket: Rc<OwnedFd>,
        loan: Loan,
    },
    Watch {
        socket: Rc<OwnedFd>,
    },
    /// Boxed, since thousands of reads wait beside a few of these.
    Stock {
        channel: Rc<OwnedFd>,
        expected: Box<Expected>,
    },
    Ask {
        channel: Rc<OwnedFd>,
        dial: u64,
        port: NonZeroU16,
    },
    Hear {
        channel: Rc<OwnedFd>,
    },
}

/// What the sockets of a stock must be.
#[derive(Clone, Copy, Debug)]
pub(super) struct Expected {
    family: Family,
    count: u16,
    netns_cookie: u64,
}

/// What becomes of work after a try.
pub(super) enum Next<R: Ring> {
    /// It is over.
    Done(Outcome<R>),
    /// It waits for readiness.
    Wait(Work),
    /// Nothing more can happen to it; it stays until it is cancelled.
    Never,
}

impl Work {
    /// Starts an operation, and does what can be done at once.
    pub(super) fn begin<R>(op: Op<R>, pool: &Pool) -> Next<R>
    where
        R: Ring<Socket = Rc<OwnedFd>, Loan = Loan>,
    {
        match op {
            Op::Accept { listener } => Work::Accept { listener }.attempt(pool),
            Op::Connect { socket, address } => Work::begin_connect(socket, address),
            Op::Recv { socket, way, eager: true } => Work::Recv { socket, way }.attempt(pool),
            Op::Recv { socket, way, eager: false } => Next::Wait(Work::Recv { socket, way }),
            Op::Send { socket, loan } => Work::Send { socket, loan }.attempt(pool),
            Op::Watch { socket } => Next::Wait(Work::Watch { socket }),
            Op::Ask { channel, dial, port } => Work::Ask { channel, dial, port }.attempt(pool),
            Op::Hear { channel } => Next::Wait(Work::Hear { channel }),
            Op::Stock { channel, family, count, netns_cookie } => {
                match opener::ask(channel.as_fd(), family, count, congestion()) {
                    Ok(()) => {
                        let expected = Box::new(Expected { family, count, netns_cookie });
                        Next::Wait(Work::Stock { channel, expected })
                    }
                    Err(_) => Next::Done(Outcome::Stocked(Err(StockError::Gone))),
                }
            }
        }
    }

    fn begin_connect<R>(socket: Rc<OwnedFd>, address: SocketAddr) -> Next<R>
    where
        R: Ring<Socket = Rc<OwnedFd>, Loan = Loan>,
    {
        match attempt::connect(&socket, address) {
            Some(result) => Next::Done(Outcome::Connected(result)),
            None => Next::Wait(Work::Connect { socket }),
        }
    }

    /// The descriptor is ready as `events` tell.
    pub(super) fn ready<R>(self, events: PollFlags, pool: &Pool) -> Next<R>
    where
        R: Ring<Socket = Rc<OwnedFd>, Loan = Loan>,
    {
        match self {
            Work::Watch { .. } if events.intersects(PollFlags::ERR | PollFlags::HUP) => {
                Next::Done(Outcome::Broken)
            }
            // io_uring adds RDHUP to every poll (IO_POLL_UNMASK). A FIN is no break, and as it stays, to ask again would
            // be to spin; whoever sends to a peer that resets after its FIN is told by that send.
            Work::Watch { .. } => Next::Never,
            Work::Connect { socket } => Next::Done(Outcome::Connected(attempt::connected(&socket))),
            work => work.attempt(pool),
        }
    }

    fn attempt<R>(self, pool: &Pool) -> Next<R>
    where
        R: Ring<Socket = Rc<OwnedFd>, Loan = Loan>,
    {
        match self {
            Work::Accept { listener } => match attempt::accept(&listener) {
                Some(result) => {
                    Next::Done(Outcome::Accepted(result.map(|(socket, family)| (Rc::new(socket), family))))
                }
                None => Next::Wait(Work::Accept { listener }),
            },
            Work::Recv { socket, way } => match attempt::recv(&socket, way, pool) {
                Some(received) => Next::Done(Outcome::Received(received)),
                None => Next::Wait(Work::Recv { socket, way }),
            },
            Work::Send { socket, mut loan } => match attempt::send(&socket, &mut loan) {
                Some(result) => Next::Done(Outcome::Sent(loan, result)),
                None => Next::Wait(Work::Send { socket, loan }),
            },
            Work::Stock { channel, expected } => {
                let Expected { family, count, netns_cookie } = *expected;
                match opener::take(channel.as_fd(), family, count, netns_cookie) {
                    Ok(Some(sockets)) => {
                        Next::Done(Outcome::Stocked(Ok(sockets.into_iter().map(Rc::new).collect())))
                    }
                    Ok(None) => Next::Wait(Work::Stock { channel, expected }),
                    Err(failure) => Next::Done(Outcome::Stocked(Err(failure))),
                }
            }
            Work::Ask { channel, dial, port } => match opener::ask_to_dial(channel.as_fd(), dial, port) {
                Ok(()) => Next::Done(Outcome::Asked(Ok(()))),
                Err(ChannelError::WouldBlock) => Next::Wait(Work::Ask { channel, dial, port }),
                Err(_) => Next::Done(Outcome::Asked(Err(StockError::Gone))),
            },
            Work::Hear { channel } => match opener::hear(channel.as_fd()) {
                Ok(Some((dial, result))) => {
                    Next::Done(Outcome::Heard(Ok(Dialled { dial, result: result.map(Rc::new) })))
                }
                Ok(None) => Next::Wait(Work::Hear { channel }),
                Err(failure) => Next::Done(Outcome::Heard(Err(failure))),
            },
            Work::Connect { socket } => Next::Wait(Work::Connect { socket }),
            Work::Watch { socket } => Next::Wait(Work::Watch { socket }),
        }
    }

    /// The outcome of work that was cancelled.
    pub(super) fn into_cancelled<R>(self) -> Outcome<R>
    where
        R: Ring<Socket = Rc<OwnedFd>, Loan = Loan>,
    {
        match self {
            Work::Send { loan, .. } => Outcome::Cancelled(Some(loan)),
            _ => Outcome::Cancelled(None),
        }
    }

    /// The outcome of work whose descriptor cannot be waited for.
    pub(super) fn into_failed<R>(self, fault: SocketError) -> Outcome<R>
    where
        R: Ring<Socket = Rc<OwnedFd>, Loan = Loan>,
    {
        match self {
            Work::Accept { .. } => Outcome::Accepted(Err(fault)),
            Work::Connect { .. } => Outcome::Connected(Err(fault)),
            Work::Recv { .. } => Outcome::Received(Received::Failed(fault)),
            Work::Send { loan, .. } => Outcome::Sent(loan, Err(fault)),
            Work::Watch { .. } => Outcome::Broken,
            Work::Stock { .. } => Outcome::Stocked(Err(StockError::Gone)),
            Work::Ask { .. } => Outcome::Asked(Err(StockError::Gone)),
            Work::Hear { .. } => Outcome::Heard(Err(StockError::Gone)),
        }
    }

    pub(super) fn socket(&self) -> &Rc<OwnedFd> {
        match self {
            Work::Accept { listener: descriptor }
            | Work::Connect { socket: descriptor }
            | Work::Recv { socket: descriptor, .. }
            | Work::Send { socket: descriptor, .. }
            | Work::Watch { socket: descriptor }
            | Work::Stock { channel: descriptor, .. }
            | Work::Ask { channel: descriptor, .. }
            | Work::Hear { channel: descriptor } => descriptor,
        }
    }

    /// The readiness that it waits for; ERR and HUP are always told.
    pub(super) fn interest(&self) -> PollFlags {
        match self {
            Work::Accept { .. } | Work::Recv { .. } | Work::Stock { .. } | Work::Hear { .. } => PollFlags::IN,
            Work::Connect { .. } | Work::Send { .. } | Work::Ask { .. } => PollFlags::OUT,
            Work::Watch { .. } => PollFlags::empty(),
        }
    }
}
