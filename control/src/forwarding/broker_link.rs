//! The channel between a broker's session and forwarding.
//!
//! The session implements the wire protocol; forwarding decides about ports and drives the engine. Each registration
//! with a broker has one [`BrokerLink`] for the broker's lifetime, across losses of its WebSocket.
//!
//! If forwarding can enter the container itself, announcements open no ports, but each announced port still gets a
//! result.

use std::num::NonZeroU16;
use std::os::fd::OwnedFd;

use tokio::sync::{mpsc, oneshot};

use crate::model::announcement::{Announced, ForwardResult};

/// The most announcements of one session that wait for forwarding.
pub(crate) const ANNOUNCEMENTS_MAX: usize = 16;

/// A message of a session to forwarding.
#[derive(Debug)]
pub enum Announcement {
    /// The container has accepted the token. An [`Announcement::Listening`] with all its ports follows.
    Up,
    /// The ports that listen in the container: all of them (`whole`), or those that changed. Each port of `opened` gets
    /// one [`SessionUpdate::Result`], unless it is reserved, or was announced before and is forwarded.
    Listening {
        /// In the order of the message.
        opened: Vec<Announced>,
        /// In the order of the message; empty if `whole`.
        closed: Vec<NonZeroU16>,
        /// Whether `opened` replaces all earlier announcements.
        whole: bool,
    },
    /// Requests a reserved forward (wire specification, A.3.8). It gets one [`SessionUpdate::Result`].
    Reserve {
        /// The port in the container.
        target: NonZeroU16,
        /// Ports on the host, in order of preference.
        candidates: Vec<NonZeroU16>,
    },
    /// The WebSocket is lost: automatic forwards over it close (`host-error`), reserved ones stay.
    Down,
    /// The broker stops: every forward over it closes (`broker-stopped`). The sender is answered when the last one has
    /// closed.
    Stop(oneshot::Sender<()>),
}

/// A message of forwarding to a session.
#[derive(Debug)]
pub enum SessionUpdate {
    /// The result for a port that was announced or reserved.
    Result(ForwardResult),
    /// The engine dials over these channels from now on, one for each of its shards, and over no earlier ones
    /// ([`Request::Dial`](landfall_engine::opener::Request::Dial)). Closing them ends the upstream.
    Serve(Vec<OwnedFd>),
}

/// A broker's end of the link.
#[derive(Debug)]
pub struct BrokerLink {
    /// Carries announcements to forwarding. Dropping it has the effect of [`Announcement::Stop`]. It is bounded: a
    /// session that waits for room stops reading from its container, so a container that announces without
    /// end slows down itself alone.
    pub announce: mpsc::Sender<Announcement>,
    /// Carries updates from forwarding.
    pub updates: mpsc::UnboundedReceiver<SessionUpdate>,
}
