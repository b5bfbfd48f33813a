//! `landfall _helper`: the first process of the helper container.

use super::args::HelperArgs;
use super::exit::{Exit, Failure};
use crate::docker::helper_container::serve::{Bounds, serve};
use crate::error::chain;

/// The program that runs as an opener: this executable.
const PROGRAM: &str = "/proc/self/exe";

/// Starts openers for one user, until no request has arrived for the idle time of [`Bounds`].
pub fn helper(args: &HelperArgs) -> Result<Exit, Failure> {
    let runtime = super::runtime()?;
    let served = serve(&args.directory, args.user, PROGRAM.as_ref(), Bounds::default());
    runtime.block_on(served).map(|()| Exit::Ok).map_err(|error| {
        let text = format!("cannot create a socket in {}: {}", args.directory.display(), chain(&error));
        Failure::new(Exit::Failed, text)
    })
}
