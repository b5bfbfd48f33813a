//! `.dockerignore`: which files of a folder do not belong to its build. Pure.
//!
//! The rules are those that Docker documents. Each line is a pattern, trimmed; one that begins with `#` is a comment. A
//! pattern is cleaned as a path, and a leading `/` means nothing. It matches a path that it describes, and everything
//! below. The last line that matches decides, and a `!` in front makes it an exception. In a pattern, `*` and `?` stop at
//! `/`, `[…]` is a set (`^` negates it), `\` takes the meaning of what follows, and `**` is any number of directories, or
//! at the end anything at all.

/// The lines of a `.dockerignore`.
#[derive(Debug, Default)]
pub(super) struct Ignored(Vec<Rule>);

#[derive(Debug)]
struct Rule {
    exception: bool,
    glob: Vec<Piece>,
}

#[derive(Debug, PartialEq, Eq)]
enum Piece {
    /// This character.
    Is(char),
    /// `?`
    One,
    /// `*`
    Many,
    /// `**/`
    Directories,
    /// `**` at the end.
    Anything,
    /// `[…]`
    Set { negated: bool, ranges: Vec<(char, char)> },
}

impl Ignored {
    /// Takes the text of a `.dockerignore`.
    ///
    /// # Errors
    /// The line that means nothing, and why.
    pub(super) fn parse(text: &str) -> Result<Ignored, String> {
        let text = text.trim_start_matches('\u{feff}');
        let mut rules = Vec::new();
        for (number, line) in (1..).zip(text.lines()).filter(|(_, line)| !line.starts_with('#')) {
            let line = line.trim();
            let (exception, pattern) = match line.strip_prefix('!') {
                Some(rest) => (true, rest.trim()),
                None => (false, line),
            };
            let wrong = |why: &str| format!(".dockerignore line {number}: {why}");
            if pattern.is_empty() {
                if exception {
                    return Err(wrong("an exception to nothing"));
                }
                continue;
            }
            rules.push(Rule { exception, glob: glob(&clean(pattern)).map_err(wrong)? });
        }
        Ok(Ignored(rules))
    }

    /// Whether the path, relative to the folder and without a leading `/`, does not belong to the build.
    pub(super) fn ignores(&self, path: &str) -> bool {
        let mut ignored = false;
        for rule in &self.0 {
            // A line that would change nothing need not be looked at.
            if rule.exception == ignored && lineage(path).any(|ancestor| matches(&rule.glob, ancestor)) {
                ignored = !rule.exception;
            }
        }
        ignored
    }

    /// Whether something below an ignored directory may belong to the build all the same.
    pub(super) fn has_exceptions(&self) -> bool {
        self.0.iter().any(|rule| rule.exception)
    }
}

/// `a/b/c`: `a`, `a/b`, `a/b/c`.
fn lineage(path: &str) -> impl Iterator<Item = &str> {
    path.match_indices('/').map(|(at, _)| at).chain([path.len()]).filter_map(|end| path.get(..end))
}

/// A path without empty components, `.` and what `..` undoes. One that leads above the folder matches nothing in it.
fn clean(pattern: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in pattern.split('/').filter(|part| !part.is_empty() && *part != ".") {
        if part == ".." && parts.last().is_some_and(|last| *last != "..") {
            parts.pop();
        } else {
            parts.push(part);
        }
    }
    parts.join("/")
}

fn glob(pattern: &str) -> Result<Vec<Piece>, &'static str> {
    let mut pieces = Vec::new();
    let mut rest = pattern.chars().peekable();
    while let Some(c) = rest.next() {
        pieces.push(match c {
            '?' => Piece::One,
            '*' if rest.next_if_eq(&'*').is_some() => {
                rest.next_if_eq(&'/');
                if rest.peek().is_none() { Piece::Anything } else { Piece::Directories }
            }
            '*' => Piece::Many,
            '\\' => Piece::Is(rest.next().ok_or("nothing follows the \\")?),
            '[' => set(&mut rest)?,
            _ => Piece::Is(c),
        });
    }
    Ok(pieces)
}

fn set(rest: &mut std::iter::Peekable<std::str::Chars<'_>>) -> Result<Piece, &'static str> {
    const OPEN: &str = "a [ without its ]";
    let negated = rest.next_if_eq(&'^').is_some();
    let mut ranges = Vec::new();
    loop {
        let member = |c: Option<char>, rest: &mut std::iter::Peekable<std::str::Chars<'_>>| match c {
            Some('\\') => rest.next().ok_or(OPEN),
            Some(c) => Ok(c),
            None => Err(OPEN),
        };
        let first = match rest.next() {
            Some(']') if !ranges.is_empty() => return Ok(Piece::Set { negated, ranges }),
            c => member(c, rest)?,
        };
        let last = if rest.next_if_eq(&'-').is_some() {
            let c = rest.next();
            member(c, rest)?
        } else {
            first
        };
        if last < first {
            return Err("a range that runs backwards");
        }
        ranges.push((first, last));
    }
}

/// Whether the whole path fits. Walks over the path once with every place in the pattern that fits so far, so no pattern
/// takes more time than its length times the path's. A place is before a piece; one that is `within` has begun `**/`.
fn matches(glob: &[Piece], path: &str) -> bool {
    let mut places = vec![false; glob.len() + 1];
    let mut within = vec![false; glob.len()];
    places[0] = true;
    pass_over(glob, &mut places);
    for c in path.chars() {
        let mut next = vec![false; glob.len() + 1];
        for (at, piece) in glob.iter().enumerate() {
            if *piece == Piece::Directories {
                within[at] |= places[at];
                next[at + 1] |= within[at] && c == '/';
            } else if places[at] {
                match piece {
                    Piece::Is(wanted) => next[at + 1] |= c == *wanted,
                    Piece::One => next[at + 1] |= c != '/',
                    Piece::Many => next[at] |= c != '/',
                    Piece::Anything | Piece::Directories => next[at] = true,
                    Piece::Set { negated, ranges } => {
                        let inside = ranges.iter().any(|(first, last)| (*first..=*last).contains(&c));
                        next[at + 1] |= inside != *negated && c != '/';
                    }
                }
            }
        }
        pass_over(glob, &mut next);
        places = next;
    }
    places[glob.len()]
}

/// Pieces that may stand for nothing.
fn pass_over(glob: &[Piece], places: &mut [bool]) {
    for (at, piece) in glob.iter().enumerate() {
        let nothing = matches!(piece, Piece::Many | Piece::Anything | Piece::Directories);
        places[at + 1] |= places[at] && nothing;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ignores(text: &str, path: &str) -> bool {
        Ignored::parse(text).unwrap().ignores(path)
    }

    #[test]
    fn the_documented_examples_match_as_documented() {
        for (pattern, path, expected) in [
            ("*/temp*", "somedir/temporary.txt", true),
            ("*/temp*", "somedir/temp", true),
            ("*/temp*", "temp", false),
            ("*/*/temp*", "somedir/subdir/temporary.txt", true),
            ("*/*/temp*", "somedir/temporary.txt", false),
            ("temp?", "tempa", true),
            ("temp?", "temp", false),
            ("**/*.go", "a/b/c.go", true),
            ("**/*.go", "c.go", true),
            ("**", "a/b", true),
            ("a/**", "a/b/c", true),
            ("a/**/c", "a/c", true),
            ("a/**/c", "a/x/y/c", true),
            ("a/**/c", "ac", false),
            ("/foo/", "foo/x", true),
            ("./foo", "foo", true),
            ("foo", "bar/foo", false),
            ("foo", "foobar", false),
            ("*.md", "a/README.md", false),
            ("[a-c].txt", "b.txt", true),
            ("[^a-c].txt", "b.txt", false),
            ("\\*.txt", "*.txt", true),
            ("\\*.txt", "a.txt", false),
            ("# not a pattern", "# not a pattern", false),
            ("a.b", "axb", false),
            ("x/../y", "y", true),
            ("../y", "y", false),
        ] {
            assert_eq!(ignores(pattern, path), expected, "{pattern} {path}");
        }
    }

    #[test]
    fn the_last_line_that_matches_decides() {
        let text = "*.md\n!README*.md\nREADME-secret.md\n";
        assert!(ignores(text, "a.md") && !ignores(text, "README-x.md") && ignores(text, "README-secret.md"));
        let text = "*.md\nREADME-secret.md\n!README*.md\n";
        assert!(!ignores(text, "README-secret.md"));
        assert!(!ignores("node_modules\n!node_modules/keep", "node_modules/keep/a.js"));
    }

    #[test]
    fn a_line_that_means_nothing_is_told() {
        assert_eq!(Ignored::parse("a\n!\n").unwrap_err(), ".dockerignore line 2: an exception to nothing");
        assert_eq!(Ignored::parse("[a").unwrap_err(), ".dockerignore line 1: a [ without its ]");
        assert!(Ignored::parse("[b-a]").is_err() && Ignored::parse("a\\").is_err());
    }

    proptest! {
        #[test]
        fn a_path_without_special_characters_matches_itself_and_what_is_below(
            path in "[a-z.]{1,4}[a-z](/[a-z]{1,3}){0,3}", below in "[a-z]{1,3}",
        ) {
            prop_assert!(ignores(&path, &path));
            let deeper = format!("{path}/{below}");
            prop_assert!(ignores(&path, &deeper));
            let longer = format!("{path}x");
            prop_assert!(!ignores(&path, &longer));
        }

        #[test]
        fn no_text_makes_it_fall(text in any::<String>(), path in any::<String>()) {
            if let Ok(ignored) = Ignored::parse(&text) {
                ignored.ignores(&path);
            }
        }
    }
}
