//! The question that `start`, `register` and `attach --cwd` ask about a folder that needs approval.

use super::QUESTION;
use super::review::Review;
use crate::cli::exit::Failure;
use crate::cli::start::Folder;
use crate::cli::ui::output::{Printer, Report};
use crate::registry::trust_file::TrustFile;
use crate::sys::paths::Home;

/// On a terminal, prints what the files of a folder request and asks once whether to approve it. Otherwise prints that
/// the files have no effect. In each case the verb continues. Prints nothing if no approval is missing. `with_ports`
/// states whether the folder's file decides about ports: options on the command line replace its ports.
///
/// # Errors
/// The approval could not be written.
pub(in crate::cli) fn offer(
    folder: &Folder,
    home: &Home,
    with_ports: bool,
    as_json: bool,
) -> Result<(), Failure> {
    let stderr = Printer::to_stderr(as_json);
    let review = match Review::of(folder, &TrustFile::of(home)) {
        Ok(review) if with_ports => review,
        Ok(review) => review.without_ports(),
        Err(error) => {
            let text = format!("commands off: {}", error.message);
            stderr.report(&Report::Note { text, hint: error.hint });
            return Ok(());
        }
    };
    if review.is_trusted() {
        return Ok(());
    }
    if !as_json && Printer::can_ask() {
        review.print(stderr);
        if stderr.ask(QUESTION) {
            return review.approve(home, stderr);
        }
    }
    stderr.report(&Report::Note { text: review.withheld(), hint: Some(review.command("")) });
    Ok(())
}
