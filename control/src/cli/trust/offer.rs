//! The question that `start`, `register` and `attach --cwd` ask about a folder that needs approval.

use super::QUESTION;
use super::review::Review;
use crate::cli::exit::Failure;
use crate::cli::start::Folder;
use crate::cli::ui::output::{Report, Talk};
use crate::registry::trust_file::TrustFile;
use crate::sys::paths::Home;

/// On a terminal, prints what the files of a folder ask for and asks once whether to approve it. Elsewhere, prints that it has
/// no effect. The verb continues in each case; nothing is printed where no approval is missing. `with_ports` is whether the
/// folder's file decides about ports: options on the command line replace what it says.
///
/// # Errors
/// The approval could not be written.
pub(in crate::cli) fn offer(
    folder: &Folder,
    home: &Home,
    with_ports: bool,
    as_json: bool,
) -> Result<(), Failure> {
    let aside = Talk::to_stderr(as_json);
    let review = match Review::of(folder, &TrustFile::of(home)) {
        Ok(review) if with_ports => review,
        Ok(review) => review.without_ports(),
        Err(error) => {
            let text = format!("commands off: {}", error.message);
            aside.report(&Report::Note { text, hint: error.hint });
            return Ok(());
        }
    };
    if review.is_trusted() {
        return Ok(());
    }
    if !as_json && Talk::can_ask() {
        review.print(aside);
        if aside.ask(QUESTION) {
            return review.approve(home, aside);
        }
    }
    aside.report(&Report::Note { text: review.withheld(), hint: Some(review.command("")) });
    Ok(())
}
