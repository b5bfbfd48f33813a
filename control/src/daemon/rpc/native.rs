//! Receives the reports of a sandbox's supervisor. Each line holds the whole state of its native listeners, for as long as
//! the connection is open. Lines are bounded, and a connection that sends an invalid report is closed.

use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::net::UnixStream;

use crate::forwarding::driver::NativeLink;
use crate::model::native_state::NativeState;

/// The longest report, in bytes. A listener takes 130 bytes and a relayed port 60.
const REPORT_BYTES_MAX: u64 = 256 * 1024;

/// Receives reports until the connection ends or breaks the protocol.
pub(super) async fn receive_reports(stream: UnixStream, link: &NativeLink) {
    let mut reader = BufReader::new(stream);
    let mut line = Vec::new();
    loop {
        line.clear();
        let read = (&mut reader).take(REPORT_BYTES_MAX).read_until(b'\n', &mut line).await;
        if read.is_err() || line.last() != Some(&b'\n') {
            return;
        }
        match serde_json::from_slice::<NativeState>(&line) {
            Ok(state) if state.is_bounded() => link.report(state),
            Ok(_) | Err(_) => return,
        }
    }
}
