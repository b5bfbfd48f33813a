//! Random bytes from the kernel.

use std::io;

use rustix::rand::GetRandomFlags;

/// The most bytes per call: `getrandom(2)` returns up to this many without interruption.
const BYTES_MAX: usize = 256;

/// Returns random bytes, fit for secrets.
///
/// # Errors
/// Those of `getrandom(2)`.
pub(crate) fn random<const N: usize>() -> io::Result<[u8; N]> {
    const { assert!(N <= BYTES_MAX) };
    let mut bytes = [0; N];
    rustix::io::retry_on_intr(|| rustix::rand::getrandom(&mut bytes, GetRandomFlags::empty()))?;
    Ok(bytes)
}
